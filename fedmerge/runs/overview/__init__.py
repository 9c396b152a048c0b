"""What runs were, over their folders: who was missing, what can be removed."""
