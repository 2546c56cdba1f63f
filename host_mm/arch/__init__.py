"""Architecture layouts of the host kernel."""
