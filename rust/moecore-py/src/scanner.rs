//! `Scanner`: the connections and the cache folder of a process's scans; `Cancel`: the switch that ends some of them.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use moecore::memory::{KvOptions, MemoryReport};
use moecore::scan::cache::Cache;
use moecore::scan::http::{Cancel as CancelSwitch, Client, ClientOptions, Cost, Origin};
use moecore::scan::hub::{Context, HubTarget, scan_hub};
use moecore::scan::{Checkpoint, local};
use moecore::{Error, ErrorKind, Result};
use pyo3::prelude::*;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::errors::{class_name, to_python};

/// Reads headers and reports on them. Safe to use from many threads.
#[pyclass(frozen, module = "moecore._core")]
pub struct Scanner {
    options: ClientOptions,
    cache: Option<Cache>,
    network: OnceLock<Network>,
}

/// Ends the scans it was given to.
#[pyclass(frozen, module = "moecore._core")]
#[derive(Default)]
pub struct Cancel(CancelSwitch);

#[pymethods]
impl Cancel {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Ends running and future scans that have this switch, with `CancelledError`.
    fn cancel(&self) {
        self.0.cancel();
    }

    /// Whether `cancel` was called.
    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

/// Threads and connections, made at the first use: a local scan needs neither.
struct Network {
    runtime: Runtime,
    client: Client,
}

#[pymethods]
impl Scanner {
    #[new]
    #[pyo3(signature = (*, cache_dir, user_agent, connections = 64, timeout = 30.0, retries = 5))]
    fn new(cache_dir: Option<PathBuf>, user_agent: String, connections: usize, timeout: f64, retries: u32) -> Self {
        let read_timeout = Duration::try_from_secs_f64(timeout).unwrap_or(Duration::from_secs(30));
        let options = ClientOptions { connections, read_timeout, retries, user_agent, ..ClientOptions::default() };
        let cache = cache_dir.map(|folder| Cache::new(&folder));
        Self { options, cache, network: OnceLock::new() }
    }

    /// Scans a repo at a commit; returns the report as JSON.
    #[pyo3(signature = (*, endpoint, token, repo, commit, files, max_model_len, batch_size, kv_cache_dtype, cache, cancel))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn scan_hub(
        &self,
        py: Python<'_>,
        endpoint: String,
        token: Option<&str>,
        repo: String,
        commit: String,
        files: Vec<String>,
        max_model_len: Option<u64>,
        batch_size: u64,
        kv_cache_dtype: String,
        cache: bool,
        cancel: &Cancel,
    ) -> PyResult<String> {
        let options = KvOptions { max_model_len, batch_size, dtype: kv_cache_dtype };
        let work = || {
            options.check()?;
            let origin = Origin::new(&endpoint, token)?;
            let network = self.network()?;
            let cost = Arc::new(Cost::new());
            let context = Context {
                client: network.client.clone(),
                cache: self.cache.clone().filter(|_| cache),
                cancel: cancel.0.clone(),
            };
            let target = HubTarget { origin, endpoint, repo, commit, files };
            // On the runtime's own threads: memory that many callers' threads allocate is memory that each of them keeps.
            let scan = async move {
                let checkpoint = scan_hub(context, target, cost.clone()).await?;
                Ok(document(checkpoint, &options, &cost))
            };
            let scan = network.runtime.spawn(scan);
            network.runtime.block_on(scan).unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
        };
        py.detach(work).map_err(|error: Error| to_python(py, &error))
    }

    /// Scans a local folder or file; returns the report as JSON.
    #[staticmethod]
    #[pyo3(signature = (*, path, max_model_len, batch_size, kv_cache_dtype))]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn scan_local(
        py: Python<'_>,
        path: PathBuf,
        max_model_len: Option<u64>,
        batch_size: u64,
        kv_cache_dtype: String,
    ) -> PyResult<String> {
        let options = KvOptions { max_model_len, batch_size, dtype: kv_cache_dtype };
        let work = || {
            options.check()?;
            Ok(document(local::scan_local(&path)?, &options, &Cost::new()))
        };
        py.detach(work).map_err(|error: Error| to_python(py, &error))
    }

    /// Whether the cache has headers of a commit.
    fn has_cached(&self, endpoint: &str, repo: &str, commit: &str) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.has(endpoint, repo, commit))
    }

    /// Seconds for which a URL's host asked everybody to wait.
    fn pause_for(&self, url: &str) -> f64 {
        self.network.get().map_or(0.0, |network| network.client.pause_for(url).as_secs_f64())
    }

    /// Tells about an answer that somebody else got, so that a pause holds for all.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn note_response(&self, py: Python<'_>, url: &str, status: u16, headers: Vec<(String, String)>) -> PyResult<()> {
        let network = self.network().map_err(|error| to_python(py, &error))?;
        network.client.note_response(url, status, &headers);
        Ok(())
    }

    /// Requests sent and bytes received so far.
    fn counters(&self) -> (u64, u64) {
        self.network.get().map_or((0, 0), |network| {
            let counters = network.client.counters();
            (counters.requests, counters.bytes)
        })
    }
}

impl Scanner {
    fn network(&self) -> Result<&Network> {
        if let Some(network) = self.network.get() {
            return Ok(network);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("moecore-scan")
            .enable_all()
            .build()
            .map_err(|source| {
                Error::new(ErrorKind::Io, "cannot start threads; raise the process limit").with_source(source)
            })?;
        let client = Client::new(self.options.clone())?;
        // Another thread may have been faster; its network is as good.
        Ok(self.network.get_or_init(|| Network { runtime, client }))
    }
}

fn document(checkpoint: Checkpoint, options: &KvOptions, cost: &Cost) -> String {
    let (config, quant_config) = (checkpoint.config.as_deref(), checkpoint.quant_config.as_deref());
    let (mut report, errors) = MemoryReport::of(&checkpoint.inventory, config, quant_config, options);
    report.warnings.splice(..0, checkpoint.warnings);
    let failures: Vec<Value> = checkpoint
        .failures
        .iter()
        .chain(&errors)
        .map(|error| json!({"type": class_name(error.kind()), "message": error.to_string()}))
        .collect();
    json!({
        "report": report,
        "failures": failures,
        "files": checkpoint.files.len(),
        "tensors": checkpoint.inventory.rows().len(),
        "cost": {"requests": cost.requests(), "bytes_fetched": cost.bytes(), "header_bytes": checkpoint.header_bytes},
    })
    .to_string()
}
