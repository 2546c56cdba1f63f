"""Intel's part: exit information and the EPT entry layout."""
