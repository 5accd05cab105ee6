"""The parts of ``realrepo``: how each family lays out its checkpoint, the stored metadata, and the writer."""
