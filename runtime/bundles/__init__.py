"""A bundle on the disk: its manifest and files, read strictly and checked whole when it opens."""
