"""The small world: scenes of coloured shapes, edits of them, their captions, and an exact judge."""
