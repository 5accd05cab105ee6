//! A repo at a commit to a [`Checkpoint`], by ranged reads of its shards' headers.

use std::sync::Arc;

use tokio::task::JoinSet;

use crate::error::{Error, ErrorKind, Result};
use crate::header::{Header, Inventory};
use crate::scan::cache::{Cache, Entry};
use crate::scan::http::{Cancel, Client, Cost, Origin, SizeHint};
use crate::scan::index::{Index, MAX_INDEX_LEN, check_name};
use crate::scan::select::{self, Selection};
use crate::scan::{Checkpoint, MAX_CONFIG_LEN};

/// First range of a repo's first shards: 97 % of headers on the hub are shorter than 100 kB. Later shards ask for what
/// the first ones needed, see [`SizeHint`].
const FIRST_RANGE: u64 = 96 << 10;

/// A repo at a commit.
#[derive(Debug)]
pub struct HubTarget {
    /// Where it is, and the token.
    pub origin: Origin,
    /// Endpoint, for the cache's key.
    pub endpoint: String,
    /// `org/name`.
    pub repo: String,
    /// The commit that the caller resolved.
    pub commit: String,
    /// All files of the commit.
    pub files: Vec<String>,
}

/// What scans of one process share.
#[derive(Clone)]
pub struct Context {
    /// Connections, limits, pauses.
    pub client: Client,
    /// Parsed headers of former runs.
    pub cache: Option<Cache>,
    /// Ends the scan early.
    pub cancel: Cancel,
}

/// One fetched header.
struct Shard {
    file: String,
    header: Header,
}

/// Reads all headers of a repo, from the cache where it has them.
pub async fn scan_hub(context: Context, target: HubTarget, cost: Arc<Cost>) -> Result<Checkpoint> {
    let (context, target, cost) = (&context, &target, &cost);
    let key = (target.endpoint.as_str(), target.repo.as_str(), target.commit.as_str());
    let cached = context.cache.as_ref().and_then(|cache| cache.load(key.0, key.1, key.2)).unwrap_or_default();
    if cached.complete {
        return Ok(from_cache(cached));
    }
    let reader = Reader { context, target, cost, hint: Arc::new(SizeHint::new(FIRST_RANGE)) };
    let known = cached.files.len();
    let (mut checkpoint, complete) = reader.read(cached).await?;
    if let Some(cache) = context.cache.as_ref().filter(|_| checkpoint.files.len() > known || complete) {
        let failures = std::mem::take(&mut checkpoint.failures);
        let entry = to_cache(checkpoint, complete);
        // Failing to store costs only the next scan's time.
        let _ = cache.store(key.0, key.1, key.2, &entry);
        checkpoint = Checkpoint { failures, ..from_cache(entry) };
    }
    Ok(checkpoint)
}

fn from_cache(entry: Entry) -> Checkpoint {
    Checkpoint {
        inventory: entry.inventory,
        config: entry.config,
        quant_config: entry.quant_config,
        files: entry.files,
        header_bytes: entry.header_bytes,
        failures: Vec::new(),
        warnings: entry.warnings,
    }
}

fn to_cache(checkpoint: Checkpoint, complete: bool) -> Entry {
    Entry {
        files: checkpoint.files,
        inventory: checkpoint.inventory,
        header_bytes: checkpoint.header_bytes,
        config: checkpoint.config,
        quant_config: checkpoint.quant_config,
        complete,
        warnings: checkpoint.warnings,
    }
}

struct Reader<'a> {
    context: &'a Context,
    target: &'a HubTarget,
    cost: &'a Arc<Cost>,
    hint: Arc<SizeHint>,
}

impl Reader<'_> {
    async fn read(&self, cached: Entry) -> Result<(Checkpoint, bool)> {
        // Names come from the hub; none of them may lead a request elsewhere.
        let (safe, unsafe_names): (Vec<String>, Vec<String>) =
            self.target.files.iter().cloned().partition(|name| check_name(name).is_ok());
        let mut selection = select::select(&safe);
        if !unsafe_names.is_empty() {
            let message =
                format!("{} file names in the listing could leave the repo; they are not read", unsafe_names.len());
            selection.warnings.push(message);
        }
        if selection.shards.is_empty() {
            let message = "the repo holds no .safetensors file; other formats are not read";
            return Err(Error::new(ErrorKind::InvalidTarget, message).with_file(&self.target.repo));
        }
        let settled = self.settle(&mut selection).await?;
        // A partial entry of another selection (an index that could not be read then) is of no use now.
        let usable = cached.files.iter().all(|file| selection.shards.contains(file));
        let cached = if usable { cached } else { Entry::default() };
        let mut checkpoint = from_cache(Entry { warnings: selection.warnings.clone(), ..cached });
        checkpoint.failures.extend(settled);

        let (config, shards) = tokio::join!(
            self.configs(&selection, &checkpoint),
            self.shards(selection.shards.iter().filter(|name| !checkpoint.files.contains(name)).cloned().collect())
        );
        take_configs(config, &mut checkpoint);
        let mut failures = shards.failures;
        if checkpoint.files.is_empty() {
            checkpoint.inventory = shards.inventory;
        } else {
            checkpoint.inventory.merge(&shards.inventory);
        }
        checkpoint.header_bytes += shards.header_bytes;
        checkpoint.files.extend(shards.files);
        if checkpoint.files.is_empty() || self.context.cancel.is_cancelled() {
            failures.sort_by_key(|error| error.kind() != ErrorKind::AccessDenied);
            return Err(failures.into_iter().next().unwrap_or_else(|| Error::new(ErrorKind::Cancelled, "cancelled")));
        }
        failures.extend(selection.missing_error("the upload is not complete"));
        checkpoint.failures.extend(failures);
        checkpoint.files.sort_unstable();
        let complete = checkpoint.failures.is_empty();
        Ok((checkpoint, complete))
    }

    /// Lets the index say which files count, where their names do not. Gives the failure when it cannot be read: all
    /// files are counted then, and the result is not for the cache.
    async fn settle(&self, selection: &mut Selection) -> Result<Option<Error>> {
        let Some(name) = selection.ambiguous_until.clone() else { return Ok(None) };
        let read = self.small(&name, MAX_INDEX_LEN).await.and_then(|json| match json {
            Some(json) => Index::parse(&json, &name)?.files(&name),
            None => Ok(Vec::new()),
        });
        match read {
            Ok(named) if named.iter().any(|file| selection.shards.contains(file)) => {
                selection.missing = named.iter().filter(|file| !selection.shards.contains(file)).cloned().collect();
                selection.shards.retain(|file| named.contains(file));
                Ok(None)
            }
            Ok(_) => {
                selection.warnings.push(format!("{name} names none of the files that are there; all are counted"));
                Ok(None)
            }
            Err(error) if error.kind() == ErrorKind::Cancelled => Err(error),
            Err(error) => Ok(Some(error)),
        }
    }

    /// Reads what `checkpoint` does not have yet.
    async fn configs(&self, selection: &Selection, checkpoint: &Checkpoint) -> [Result<Option<Vec<u8>>>; 2] {
        let read = async |name: &Option<String>, wanted: bool| match name {
            Some(name) if wanted => self.small(name, MAX_CONFIG_LEN).await,
            _ => Ok(None),
        };
        let (config, quant_config) = tokio::join!(
            read(&selection.config, checkpoint.config.is_none()),
            read(&selection.quant_config, checkpoint.quant_config.is_none())
        );
        [config, quant_config]
    }

    async fn small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Context { client, cancel, .. } = self.context;
        let url = self.target.origin.resolve_url(&self.target.repo, &self.target.commit, name)?;
        client.small_file(&self.target.origin, &url, name, limit, cancel, self.cost).await
    }

    /// Reads the headers of all `files`, many at once.
    async fn shards(&self, files: Vec<String>) -> Shards {
        let mut shards = Shards::default();
        let mut tasks = JoinSet::new();
        for file in files {
            tasks.spawn(self.task(file));
        }
        while let Some(done) = tasks.join_next().await {
            match done {
                Ok(result) => shards.take(result),
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => {}
            }
            if shards.hopeless() {
                tasks.abort_all();
            }
        }
        shards
    }

    /// Fetches and parses one header. The JSON is gone when it ends, the header when it is taken.
    fn task(&self, file: String) -> impl Future<Output = Result<Shard>> + Send + 'static {
        let Context { client, cancel, .. } = self.context.clone();
        let url = self.target.origin.resolve_url(&self.target.repo, &self.target.commit, &file);
        let (origin, hint, cost) = (self.target.origin.clone(), self.hint.clone(), self.cost.clone());
        async move {
            let bytes = client.header(&origin, &url?, &file, &hint, &cancel, &cost).await?;
            let header = Header::parse(&bytes.json, bytes.file_len, &file)?;
            Ok(Shard { file, header })
        }
    }
}

fn take_configs([config, quant_config]: [Result<Option<Vec<u8>>>; 2], checkpoint: &mut Checkpoint) {
    for (result, place) in [(config, &mut checkpoint.config), (quant_config, &mut checkpoint.quant_config)] {
        match result {
            Ok(Some(bytes)) => *place = Some(bytes),
            Ok(None) => {}
            Err(error) => checkpoint.failures.push(error),
        }
    }
}

#[derive(Default)]
struct Shards {
    inventory: Inventory,
    header_bytes: u64,
    files: Vec<String>,
    failures: Vec<Error>,
}

impl Shards {
    fn take(&mut self, result: Result<Shard>) {
        match result {
            Ok(Shard { file, header }) => {
                self.inventory.add_header(&header);
                self.header_bytes += header.header_len();
                self.files.push(file);
            }
            Err(error) => self.failures.push(error),
        }
    }

    /// Whether the other shards would fail the same way: a gated repo, a cancelled scan, a host that gives nothing.
    fn hopeless(&self) -> bool {
        let hopeless = |error: &Error| {
            matches!(error.kind(), ErrorKind::AccessDenied | ErrorKind::Cancelled | ErrorKind::RateLimited)
        };
        self.failures.iter().any(hopeless)
    }
}
