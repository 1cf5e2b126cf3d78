"""The laptop demo: its data, its run, its report."""
