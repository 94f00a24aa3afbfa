"""Images: immutable, content-addressed EROFS layers and the store that keeps them (DESIGN 4.6)."""
