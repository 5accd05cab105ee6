//! Tensor names to patterns: the numbered parts of a dotted name become `{}`.
//!
//! A checkpoint of 92,000 tensors has some 50 patterns. Roles are found once for a pattern, and a tensor keeps only
//! its numbers, so neither time nor memory grows with the length of the names.

/// Numbers kept for one tensor. Deeper ones stay in the pattern as text.
pub const MAX_INDICES: usize = 4;

/// A word that a number may follow in the same part (Switch: `expert_7`).
const NUMBERED_WORD: &str = "expert_";

/// The numbers of one tensor name, in order; unused places are zero.
pub type Indices = [u16; MAX_INDICES];

/// Writes the pattern of `name` into `pattern` and returns its numbers.
///
/// A part is numbered when it is a plain decimal number (`layers.3`) or `expert_` and a number (Switch). Numbers
/// with leading zeros or above 65,535 stay text, so that [`expand`] gives the name back.
pub fn collapse(name: &str, pattern: &mut String) -> Indices {
    pattern.clear();
    let mut indices = [0; MAX_INDICES];
    if name.contains("{}") {
        // No real tensor is called so; its braces must not be taken for numbers.
        pattern.push_str(&name.replace("{}", "{ }"));
        return indices;
    }
    let (mut used, mut copied, mut start) = (0, 0, 0);
    // Most parts are words: they are copied in one piece up to the next number.
    while used < MAX_INDICES {
        let part = &name[start..];
        let part = part.split_once('.').map_or(part, |(part, _)| part);
        let digits = part.strip_prefix(NUMBERED_WORD).unwrap_or(part);
        if let Some(value) = number(digits) {
            pattern.push_str(&name[copied..start + part.len() - digits.len()]);
            pattern.push_str("{}");
            indices[used] = value;
            used += 1;
            copied = start + part.len();
        }
        start += part.len() + 1;
        if start > name.len() {
            break;
        }
    }
    pattern.push_str(&name[copied..]);
    indices
}

/// The name that `collapse` took apart.
#[must_use]
pub fn expand(pattern: &str, indices: Indices) -> String {
    let mut name = String::with_capacity(pattern.len() + 4);
    let mut rest = pattern;
    for index in indices {
        let Some((before, after)) = rest.split_once("{}") else { break };
        name.push_str(before);
        name.push_str(&index.to_string());
        rest = after;
    }
    name.push_str(rest);
    name
}

fn number(digits: &str) -> Option<u16> {
    match digits.as_bytes() {
        // `parse` refuses what holds anything but digits, and numbers above 65,535.
        [b'1'..=b'9', ..] | [b'0'] => digits.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern_of(name: &str) -> (String, Indices) {
        let mut pattern = String::new();
        let indices = collapse(name, &mut pattern);
        (pattern, indices)
    }

    #[test]
    fn numbers_leave_the_pattern() {
        assert_eq!(
            pattern_of("model.layers.3.mlp.experts.17.up_proj.weight"),
            ("model.layers.{}.mlp.experts.{}.up_proj.weight".to_owned(), [3, 17, 0, 0])
        );
        assert_eq!(
            pattern_of("encoder.block.1.layer.1.mlp.experts.expert_9.wi.weight"),
            ("encoder.block.{}.layer.{}.mlp.experts.expert_{}.wi.weight".to_owned(), [1, 1, 9, 0])
        );
    }

    #[test]
    fn only_plain_numbers_count() {
        assert_eq!(pattern_of("{}.1.{}"), ("{ }.1.{ }".to_owned(), [0; 4]));
        for name in ["h.007.w1", "a.70000.b", "conv1d.weight", "expert_x.w", ""] {
            assert_eq!(pattern_of(name), (name.to_owned(), [0; 4]));
        }
    }

    proptest! {
        #[test]
        fn expand_undoes_collapse(name in "([a-z_0-9]{0,4}\\.){0,7}(expert_)?[0-9]{0,6}") {
            let (pattern, indices) = pattern_of(&name);
            prop_assert_eq!(expand(&pattern, indices), name);
        }
    }
}
