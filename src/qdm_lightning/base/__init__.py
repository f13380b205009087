"""The ground floor: files, checks, trust and ranks. Standard library only; torch where it is asked for."""
