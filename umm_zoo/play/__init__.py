"""A page in the browser: a finished run tried out, two side by side, a training started and watched."""
