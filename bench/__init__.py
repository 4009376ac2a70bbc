"""How fast, in how much memory, and what it would cost at real sizes."""
