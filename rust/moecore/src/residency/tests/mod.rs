//! Tests of the room: the table alone, under threads and under loom; the book by properties; replays.

mod book;
#[cfg(moecore_loom)]
mod loom;
mod replay;
#[cfg(not(moecore_loom))]
mod stress;
#[cfg(not(moecore_loom))]
mod table;
