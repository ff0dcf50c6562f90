"""The programs, by what they are about; each file ends with its CASES."""
