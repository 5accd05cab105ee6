//! Parsed headers on disk, by endpoint, repo and commit. A commit never changes, so an entry never expires.
//!
//! An entry that cannot be read is as good as absent, and one that cannot be written costs only the next scan time:
//! the cache never fails a scan. Files appear whole (written aside, then renamed).

mod codec;

use std::path::{Path, PathBuf};

pub use codec::Entry;

/// A folder of entries.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// A cache in `folder`, which is made when something is stored.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.join(format!("headers-v{}", codec::VERSION)) }
    }

    /// The entry of a commit, if there is one that can be read.
    #[must_use]
    pub fn load(&self, endpoint: &str, repo: &str, commit: &str) -> Option<Entry> {
        Entry::decode(&std::fs::read(self.path(endpoint, repo, commit)?).ok()?)
    }

    /// Whether a commit is here as a whole, so that nothing of it need be asked for.
    #[must_use]
    pub fn has(&self, endpoint: &str, repo: &str, commit: &str) -> bool {
        self.load(endpoint, repo, commit).is_some_and(|entry| entry.complete)
    }

    /// Stores the entry of a commit; says whether it could.
    #[must_use]
    pub fn store(&self, endpoint: &str, repo: &str, commit: &str, entry: &Entry) -> bool {
        let Some(path) = self.path(endpoint, repo, commit) else { return false };
        let write = || -> std::io::Result<()> {
            let folder = path.parent().unwrap_or(&self.folder);
            std::fs::create_dir_all(folder)?;
            // Unlike names for processes and threads that store the same commit at once.
            let aside = folder.join(format!(".{}-{:?}.tmp", std::process::id(), std::thread::current().id()));
            std::fs::write(&aside, entry.encode())?;
            std::fs::rename(&aside, &path).inspect_err(|_| drop(std::fs::remove_file(&aside)))
        };
        write().is_ok()
    }

    fn path(&self, endpoint: &str, repo: &str, commit: &str) -> Option<PathBuf> {
        let plain = |text: &str| {
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        let name = repo.replace('/', "--");
        // The commit becomes a file name: anything but a plain word is not a commit.
        if !plain(&name) || !plain(commit) || name.starts_with('.') || commit.starts_with('.') {
            return None;
        }
        let host = format!("{:016x}", codec::checksum(endpoint.as_bytes()));
        Some(self.folder.join(host).join(name).join(format!("{commit}.bin")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn entry() -> Entry {
        let mut entry = Entry { files: vec!["a".into()], config: Some(b"{}".to_vec()), ..Entry::default() };
        entry.inventory.add("x.{}", &[2], Dtype::BF16, [1, 0, 0, 0]);
        entry
    }

    #[test]
    fn entries_come_back_and_commits_are_apart() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        assert!(cache.store("http://hub", "org/name", "abc", &entry()));
        assert_eq!(cache.load("http://hub", "org/name", "abc"), Some(entry()));
        assert!(!cache.has("http://hub", "org/name", "abc"), "not complete");
        assert!(cache.store("http://hub", "org/name", "abd", &Entry { complete: true, ..entry() }));
        assert!(cache.has("http://hub", "org/name", "abd"));
        for (endpoint, repo, commit) in
            [("http://other", "org/name", "abc"), ("http://hub", "org/other", "abc"), ("http://hub", "org/name", "abe")]
        {
            assert_eq!(cache.load(endpoint, repo, commit), None);
        }
    }

    #[test]
    fn names_cannot_leave_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        for (repo, commit) in
            [("org/../../x", "a/b"), ("org/name", "../../x"), ("org/name", ""), ("..", "a"), ("a\\b", "c")]
        {
            assert!(!cache.store("http://hub", repo, commit, &entry()), "{repo} {commit}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_entry_is_absent() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        assert!(cache.store("http://hub", "org/name", "abc", &entry()));
        let path = cache.path("http://hub", "org/name", "abc").unwrap();
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(cache.load("http://hub", "org/name", "abc"), None, "cut at {length}");
        }
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            std::fs::write(&path, &flipped).unwrap();
            assert_eq!(cache.load("http://hub", "org/name", "abc"), None, "flipped at {at}");
        }
    }
}
