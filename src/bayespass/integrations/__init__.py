"""What other libraries' models need on top of the single pass; each file names its library."""
