"""Image policies: what size an image of any size is brought to, and how."""
