//! Tensor names and `config.json` to a [`ModelLayout`]: which tensor is what, and where the experts are.
//!
//! ```text
//! header::Inventory (patterns, shapes, 20 bytes a tensor)
//!              |  packing: companions -> logical parameters
//!              |  roles:   pattern    -> role, layer, expert
//!              v
//!          ModelLayout (groups, expert blocks)      config.json -> CachePlan (what each layer keeps of the past)
//! ```
//!
//! Families are data: word lists in [`roles`], key lists in [`config`], rows in [`families`].

pub mod attention;
pub mod blocks;
pub mod config;
pub mod families;
pub mod layout;
pub mod packing;
pub mod roles;
pub mod unlisted;

pub use attention::CachePlan;
pub use blocks::ExpertBlock;
pub use config::Config;

pub use layout::{ModelLayout, TensorGroup};
pub use roles::Role;
