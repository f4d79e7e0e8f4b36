"""Commands that fold with the kernel, check it, and build the folder that the Hub loads."""
