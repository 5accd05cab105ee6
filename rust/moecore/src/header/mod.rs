//! Bytes to [`Header`]: a strict parser of safetensors headers.
