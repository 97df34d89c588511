"""What a run keeps in its folder and says about itself."""
