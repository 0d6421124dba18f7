"""Small data, configurations and teachers that show the whole job on one machine."""
