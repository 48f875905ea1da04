"""The engines that come with fdbroker, one a file; others are installed under the same entry point group."""
