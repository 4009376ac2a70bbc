"""Every method beyond the three lessons: one flat file each, on the lessons' skeleton."""
