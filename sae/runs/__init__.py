"""Operations on run folders, one per file."""
