"""Tables, pictures and a page from a run folder. This package only reads what training wrote."""
