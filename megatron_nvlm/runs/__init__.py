"""What a run is: from its file to its objects."""
