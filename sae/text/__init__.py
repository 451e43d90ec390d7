"""What text is before it is tokens: documents, the files they come from, chats, and long texts in pieces."""
