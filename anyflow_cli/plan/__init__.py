"""What a run will cost, from its recipe alone: nothing is downloaded, and no tensor has storage."""
