"""Text up to its tokens: documents, the files they come from, chats, and long texts in pieces."""
