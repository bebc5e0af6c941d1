"""From a traced model to one Q/DQ graph per distinct assignment, all over one weight file."""
