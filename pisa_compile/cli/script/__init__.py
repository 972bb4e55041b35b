"""`pisa run`: somebody's script, and what is changed around it."""
