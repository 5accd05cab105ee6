//! Element types of safetensors 0.8, sub-byte ones included.

use std::fmt;
use std::str::FromStr;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $bits:literal;)*) => {
        /// An element type as safetensors names it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Dtype { $($(#[$doc])* $variant,)* }

        impl Dtype {
            /// Every dtype, in the order of their codes.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];

            /// The name in a safetensors header.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Bits of one element. Sub-byte types have fewer than 8.
            #[must_use]
            pub const fn bits(self) -> u64 {
                match self { $(Dtype::$variant => $bits,)* }
            }
        }

        impl FromStr for Dtype {
            type Err = UnknownDtype;

            fn from_str(name: &str) -> Result<Self, UnknownDtype> {
                match name {
                    $($name => Ok(Dtype::$variant),)*
                    _ => Err(UnknownDtype(name.to_owned())),
                }
            }
        }
    };
}

dtypes! {
    /// Boolean, one byte each.
    Bool = "BOOL", 8;
    /// OCP MX FP4 (E2M1).
    F4 = "F4", 4;
    /// OCP MX FP6 (E2M3).
    F6E2M3 = "F6_E2M3", 6;
    /// OCP MX FP6 (E3M2).
    F6E3M2 = "F6_E3M2", 6;
    /// Unsigned byte.
    U8 = "U8", 8;
    /// Signed byte.
    I8 = "I8", 8;
    /// FP8 with 5 exponent bits.
    F8E5M2 = "F8_E5M2", 8;
    /// FP8 with 4 exponent bits.
    F8E4M3 = "F8_E4M3", 8;
    /// Power-of-two scale (OCP MX).
    F8E8M0 = "F8_E8M0", 8;
    /// FP8 E4M3 without negative zero.
    F8E4M3Fnuz = "F8_E4M3FNUZ", 8;
    /// FP8 E5M2 without negative zero.
    F8E5M2Fnuz = "F8_E5M2FNUZ", 8;
    /// Signed 16-bit integer.
    I16 = "I16", 16;
    /// Unsigned 16-bit integer.
    U16 = "U16", 16;
    /// IEEE half.
    F16 = "F16", 16;
    /// bfloat16.
    BF16 = "BF16", 16;
    /// Signed 32-bit integer.
    I32 = "I32", 32;
    /// Unsigned 32-bit integer.
    U32 = "U32", 32;
    /// IEEE single.
    F32 = "F32", 32;
    /// Complex of two IEEE singles.
    C64 = "C64", 64;
    /// IEEE double.
    F64 = "F64", 64;
    /// Signed 64-bit integer.
    I64 = "I64", 64;
    /// Unsigned 64-bit integer.
    U64 = "U64", 64;
}

impl Dtype {
    /// The dtype with this code, as [`Dtype::ALL`] orders them.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Whether the type holds floating-point numbers.
    #[must_use]
    pub const fn is_float(self) -> bool {
        !matches!(
            self,
            Self::Bool | Self::U8 | Self::I8 | Self::I16 | Self::U16 | Self::I32 | Self::U32 | Self::I64 | Self::U64
        )
    }

    /// Bytes of `elements` elements: `None` when they overflow or do not fill whole bytes.
    #[must_use]
    pub fn bytes_of(self, elements: u64) -> Option<u64> {
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A dtype name that safetensors 0.8 does not define.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype `{0}`; safetensors 0.8 does not define it")]
pub struct UnknownDtype(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_round_trip() {
        for (code, &dtype) in Dtype::ALL.iter().enumerate() {
            assert_eq!(dtype.name().parse(), Ok(dtype));
            assert_eq!(Dtype::from_code(u8::try_from(code).unwrap()), Some(dtype));
        }
        assert_eq!(Dtype::from_code(u8::MAX), None);
        assert!("f32".parse::<Dtype>().is_err());
    }

    #[test]
    fn sub_byte_types_must_fill_bytes() {
        assert_eq!(Dtype::F4.bytes_of(6), Some(3));
        assert_eq!(Dtype::F4.bytes_of(7), None);
        assert_eq!(Dtype::F6E2M3.bytes_of(4), Some(3));
        assert_eq!(Dtype::F64.bytes_of(u64::MAX / 8), None);
    }
}
