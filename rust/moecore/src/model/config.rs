//! `config.json` read by meaning: the same fact has a dozen names, and may sit in a nested section.

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};

/// No length, width or count of a model is larger.
const LARGEST: u64 = 1 << 40;

/// Sections that hold the language model of a composite model, outermost first.
const TEXT_SECTIONS: &[&[&str]] = &[
    &["text_config"],
    &["thinker_config", "text_config"],
    &["llm_config"],
    &["language_config"],
    &["language_model_config"],
    &["llm"],
];

/// A parsed `config.json` with its language section.
#[derive(Debug, Clone)]
pub struct Config {
    root: Value,
    text_path: &'static [&'static str],
    defaults: &'static [(&'static str, u64)],
}

impl Config {
    /// Parses `json`; the error names `file`.
    pub fn parse(json: &[u8], file: &str) -> Result<Self> {
        let root: Value = serde_json::from_slice(json).map_err(|source| {
            Error::new(ErrorKind::InvalidConfig, "not valid JSON; download it again")
                .with_file(file)
                .with_source(source)
        })?;
        if !root.is_object() {
            return Err(Error::new(ErrorKind::InvalidConfig, "must hold a JSON object").with_file(file));
        }
        Ok(Self::new(root))
    }

    fn new(root: Value) -> Self {
        let text_path = TEXT_SECTIONS.iter().find(|path| walk(&root, path).is_some_and(Value::is_object));
        Self { text_path: text_path.copied().unwrap_or(&[]), root, defaults: &[] }
    }

    /// An empty config, for checkpoints that come without one.
    #[must_use]
    pub fn empty() -> Self {
        Self::new(Value::Object(serde_json::Map::new()))
    }

    /// The same config with values of the model's config class for whole-number keys that the file leaves out.
    #[must_use]
    pub fn with_defaults(mut self, defaults: &'static [(&'static str, u64)]) -> Self {
        self.defaults = defaults;
        self
    }

    /// The whole file.
    #[must_use]
    pub fn root(&self) -> &Value {
        &self.root
    }

    fn text(&self) -> &Value {
        walk(&self.root, self.text_path).unwrap_or(&self.root)
    }

    /// The value at a dotted key: language section first, then the file's top. `null` counts as absent.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        let path: Vec<&str> = key.split('.').collect();
        [self.text(), &self.root].into_iter().find_map(|section| walk(section, &path).filter(|value| !value.is_null()))
    }

    /// The first of `keys` that is a non-negative whole number.
    #[must_use]
    pub fn int(&self, keys: &[&str]) -> Option<u64> {
        keys.iter().find_map(|key| as_int(self.get(key)?)).or_else(|| self.default(keys))
    }

    fn default(&self, keys: &[&str]) -> Option<u64> {
        self.defaults.iter().find(|(key, _)| keys.contains(key)).map(|&(_, value)| value)
    }

    /// The first of `keys` that is a number, or the value of its list at `layer`.
    #[must_use]
    pub fn int_at(&self, keys: &[&str], layer: usize) -> Option<u64> {
        let found = keys.iter().find_map(|key| match self.get(key)? {
            Value::Array(list) => as_int(list.get(layer)?),
            value => as_int(value),
        });
        found.or_else(|| self.default(keys))
    }

    /// The first of `keys` that is a number, or the largest of its list.
    #[must_use]
    pub fn int_max(&self, keys: &[&str]) -> Option<u64> {
        keys.iter().find_map(|key| match self.get(key)? {
            Value::Array(list) => list.iter().filter_map(as_int).max(),
            value => as_int(value),
        })
    }

    /// The first of `keys` for a layer: its own entry in `per_layer_config`, else the model's number or its list.
    #[must_use]
    pub fn int_of_layer(&self, keys: &[&str], layer: usize) -> Option<u64> {
        let own = self.get("per_layer_config").and_then(|layers| layers.get(layer.to_string()));
        own.and_then(|own| keys.iter().find_map(|key| as_int(own.get(key)?))).or_else(|| self.int_at(keys, layer))
    }

    /// The first of `keys` that is there and neither a whole number nor a list: a config that cannot be taken at its word.
    #[must_use]
    pub fn not_a_number<'k>(&self, keys: &[&'k str]) -> Option<&'k str> {
        let odd = |key: &&str| self.get(key).is_some_and(|value| as_int(value).is_none() && !value.is_array());
        keys.iter().copied().find(odd)
    }

    /// A boolean.
    #[must_use]
    pub fn flag(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// A string.
    #[must_use]
    pub fn text_value(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A list.
    #[must_use]
    pub fn list(&self, key: &str) -> Option<&[Value]> {
        self.get(key)?.as_array().map(Vec::as_slice)
    }

    /// `model_type` of the file (outermost), the name users know.
    #[must_use]
    pub fn model_type(&self) -> Option<&str> {
        self.root.get("model_type").and_then(Value::as_str).or_else(|| self.text_model_type())
    }

    /// `model_type` of the language section.
    #[must_use]
    pub fn text_model_type(&self) -> Option<&str> {
        self.text().get("model_type").and_then(Value::as_str).filter(|name| !name.is_empty())
    }

    /// Name of the model's own dtype, as `torch_dtype` or `dtype` state it.
    #[must_use]
    pub fn model_dtype(&self) -> Option<&str> {
        let name = self.text_value("dtype").or_else(|| self.text_value("torch_dtype"))?;
        Some(name.strip_prefix("torch.").unwrap_or(name))
    }

    /// Transformer layers of the language model.
    #[must_use]
    pub fn layers(&self) -> Option<u64> {
        let listed = || ["layers_block_type", "layer_types"].iter().find_map(|key| Some(self.list(key)?.len() as u64));
        self.int(&["num_hidden_layers", "n_layers", "num_layers", "n_layer"]).or_else(listed)
    }

    /// Routed experts of a layer; the largest where layers differ.
    #[must_use]
    pub fn num_experts(&self) -> Option<u64> {
        self.int_max(&[
            "num_experts",
            "n_routed_experts",
            "num_local_experts",
            "moe_num_experts",
            "num_routed_experts",
            "ffn_config.moe_num_experts",
            "moe.num_experts",
        ])
    }

    /// Experts that text tokens choose among, where a block holds those of images behind them: ERNIE-VL states two
    /// counts, or one count and two sizes.
    #[must_use]
    pub fn text_experts(&self) -> Option<u64> {
        let pair = |key: &str| self.list(key).filter(|list| list.len() == 2);
        let is_ernie = self.text_model_type().is_some_and(|name| name.starts_with("ernie"));
        let of_sizes = || pair("moe_intermediate_size").filter(|_| is_ernie).and_then(|_| self.num_experts());
        pair("moe_num_experts").and_then(|list| as_int(&list[0])).or_else(of_sizes)
    }

    /// Routed experts that one token uses in MoE layer `layer`.
    ///
    /// Never `top_k`: that is a sampling default (50) which old configs carry.
    #[must_use]
    pub fn experts_per_token(&self, layer: usize) -> Option<u64> {
        self.int_at(
            &[
                "num_experts_per_tok",
                "num_experts_per_token",
                "experts_per_token",
                "moe_topk",
                "moe_k",
                "moe_top_k",
                "top_k_experts",
                "num_selected_experts",
                "ffn_config.moe_top_k",
                "moe.num_experts_per_tok",
            ],
            layer,
        )
    }

    /// Shared experts of a layer, as the config counts them.
    #[must_use]
    pub fn shared_experts(&self) -> Option<u64> {
        self.int_max(&["n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"])
    }

    /// The longest context that the config states.
    #[must_use]
    pub fn max_model_len(&self) -> Option<u64> {
        self.int(&[
            "max_position_embeddings",
            "max_seq_len",
            "n_positions",
            "max_sequence_length",
            "seq_length",
            "n_ctx",
            "model_max_length",
        ])
    }
}

fn walk<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, key| value.get(key))
}

fn as_int(value: &Value) -> Option<u64> {
    // Some configs write whole numbers as floats (`"sliding_window": 4096.0`).
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be whole and in range")]
    let whole = value
        .as_u64()
        .or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..1e15).contains(x)).map(|x| x as u64));
    whole.filter(|&number| number <= LARGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Config {
        Config::parse(json.as_bytes(), "config.json").unwrap()
    }

    #[test]
    fn the_language_section_wins_and_null_is_absent() {
        let config = config(
            r#"{"model_type":"a","num_hidden_layers":1,"dtype":null,"torch_dtype":"torch.bfloat16",
                "thinker_config":{"text_config":{"model_type":"b","num_hidden_layers":2,"kv_lora_rank":null}}}"#,
        );
        assert_eq!(config.layers(), Some(2));
        assert_eq!((config.model_type(), config.text_model_type()), (Some("a"), Some("b")));
        assert_eq!(config.int(&["kv_lora_rank"]), None);
        assert_eq!(config.model_dtype(), Some("bfloat16"));
    }

    #[test]
    fn counts_may_be_lists_and_top_k_is_not_the_sampling_default() {
        let config = config(r#"{"moe_topk":[8,6],"num_experts":[64,32],"top_k":50}"#);
        assert_eq!(config.experts_per_token(1), Some(6));
        assert_eq!(config.num_experts(), Some(64));
        assert_eq!(self::config(r#"{"top_k":50}"#).experts_per_token(0), None);
    }

    #[test]
    fn bad_json_names_the_file() {
        let error = Config::parse(b"{", "repo/config.json").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().starts_with("repo/config.json: "), "{error}");
        assert!(Config::parse(b"[]", "config.json").is_err());
    }
}
