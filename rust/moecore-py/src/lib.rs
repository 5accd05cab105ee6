//! `moecore._core`: a method parses arguments, lets go of the GIL, calls down, maps the error. Nothing else.

mod cuda;
mod cuda_experts;
mod cuda_testing;
mod errors;
mod experts;
mod host_engine;
mod policy;
mod replay;
mod routing;
mod scanner;
mod stats;

use pyo3::prelude::*;

/// The Rust core of moecore.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::cuda::{CudaEngine, PinnedArena, cuda_available, load_kernels};

    #[pymodule_export]
    use super::cuda_experts::{CudaExperts, HostRows};

    #[pymodule_export]
    use super::cuda_testing::_testing;

    #[pymodule_export]
    use super::experts::ExpertStore;

    #[pymodule_export]
    use super::host_engine::{HostEngine, Rows, Stream};

    #[pymodule_export]
    use super::policy::check_policy;

    #[pymodule_export]
    use super::replay::replay_policy;

    #[pymodule_export]
    use super::routing::{
        experts_down, experts_up, routing_align, routing_combine, routing_gate, routing_permute, routing_route,
        routing_workspace,
    };

    #[pymodule_export]
    use super::scanner::{Cancel, Scanner};

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "the name Python uses")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
