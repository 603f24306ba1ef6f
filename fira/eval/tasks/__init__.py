"""Tasks that need steps: questions made by a program, with the steps that lead to their answers."""
