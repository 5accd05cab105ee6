//! Where header bytes come from: local files and hub ranges.
