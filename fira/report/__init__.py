"""From a run folder to tables, pictures and a page. Reads files only."""
