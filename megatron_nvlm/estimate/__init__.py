"""What a run costs, known without running it. Nothing that trains or answers imports this."""
