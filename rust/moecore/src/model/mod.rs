//! Tensor names and `config.json` to a layout: layer, expert, role.
