"""Methods that train parts, before any paper's method uses them."""
