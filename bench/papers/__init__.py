"""Tables of papers: what they print beside what our records say."""
