//! Templates of processors: what is changed of what the host's processor and KVM offer, Firecracker's `/cpu-config`.

use std::fmt;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Changes to what the guest's processors are. Fields of other architectures are refused as unknown.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Capabilities that KVM must have, by number (`"121"`), or need not have (`"!121"`).
    #[serde(default)]
    pub kvm_capabilities: Vec<Capability>,
    /// Changes to answers of `CPUID`.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes to model-specific registers.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Processors by name: each has exactly the features of its list, on every host that has them all. The numbers are those of
/// the x86-64 psABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CpuBaseline {
    /// SSE 4.2 and `POPCNT`, no `XSAVE`.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2, FMA, BMI; also AES.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// AVX-512.
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl CpuBaseline {
    /// All of them; each has what those before it have.
    pub const ALL: [Self; 3] = [Self::V2, Self::V3, Self::V4];
}

impl fmt::Display for CpuBaseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        })
    }
}

/// What a configuration file says of the processors: a template, or the path of a file with one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum CpuConfigSource {
    Path(String),
    Template(CpuConfig),
}

impl<'de> Deserialize<'de> for CpuConfigSource {
    // By hand, because a mistake in a template shall be named.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(path) => Ok(Self::Path(path)),
            template => CpuConfig::deserialize(template).map(Self::Template).map_err(D::Error::custom),
        }
    }
}

/// A capability of KVM, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// `KVM_CAP_…`.
    pub number: u32,
    /// KVM must have it; otherwise it need not, even if a VM usually cannot do without.
    pub needed: bool,
}

/// What to change of one answer of `CPUID`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// `eax` of the question.
    pub leaf: Hex,
    /// `ecx` of the question.
    pub subleaf: Hex,
    /// KVM's flags of the entry.
    pub flags: u32,
    /// One for each register that is changed.
    pub modifiers: Vec<RegisterModifier>,
}

/// What to change of one register of an answer of `CPUID`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which one.
    pub register: CpuidRegister,
    /// How.
    pub bitmap: Bitmap<32>,
}

/// The registers of an answer of `CPUID`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// What to change of one model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Which one.
    pub addr: Hex,
    /// How.
    pub bitmap: Bitmap<64>,
}

/// A number of 32 bits that is written as text, `0x…` or `0b…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hex(pub u32);

/// Bits to set, to clear and to leave: `0b` and one of `1`, `0` and `x` for each, the highest first. Underscores may
/// stand between; bits that are not named are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bitmap<const BITS: u32> {
    /// Bits that are changed.
    pub mask: u64,
    /// What they become; no bit outside of `mask`.
    pub value: u64,
}

impl<const BITS: u32> Bitmap<BITS> {
    /// `register` with the changes.
    pub const fn apply(self, register: u64) -> u64 {
        register & !self.mask | self.value
    }

    fn parse(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix("0b").unwrap_or(text);
        let (mut map, mut place) = (Self::default(), 0);
        for digit in digits.chars().rev().filter(|digit| *digit != '_') {
            if place == BITS {
                return Err(format!("the bitmap {text:?} has more than {BITS} bits"));
            }
            match digit {
                'x' => {}
                '0' => map.mask |= 1 << place,
                '1' => (map.mask, map.value) = (map.mask | 1 << place, map.value | 1 << place),
                other => return Err(format!("{other:?} in the bitmap {text:?}: give 0, 1, x or _")),
            }
            place += 1;
        }
        Ok(map)
    }
}

impl<const BITS: u32> fmt::Display for Bitmap<BITS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        for place in (0..BITS).rev() {
            f.write_str(match (self.mask >> place & 1, self.value >> place & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })?;
        }
        Ok(())
    }
}

impl<const BITS: u32> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => u32::from_str_radix(digits, 16).ok(),
            (_, Some(digits)) => u32::from_str_radix(digits, 2).ok(),
            _ => None,
        };
        let wrong = || D::Error::custom(format!("{text:?} is not a number of 32 bits that begins with 0x or 0b"));
        number.map(Self).ok_or_else(wrong)
    }
}

impl Serialize for Capability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}{}", if self.needed { "" } else { "!" }, self.number))
    }
}

impl<'de> Deserialize<'de> for Capability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (digits, needed) = text.strip_prefix('!').map_or((text.as_str(), true), |digits| (digits, false));
        let wrong = |_| D::Error::custom(format!("{text:?} is not the number of a KVM capability, such as \"121\""));
        digits.parse().map(|number| Self { number, needed }).map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_says_which_bits_change() {
        let text = r#"{
            "kvm_capabilities": ["171", "!172"],
            "cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0b0", "flags": 1,
                                 "modifiers": [{"register": "ebx", "bitmap": "0bx01_0"}]}],
            "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1"}]
        }"#;
        let config: CpuConfig = serde_json::from_str(text).unwrap();
        let [modifier] = &config.cpuid_modifiers[..] else { panic!("{config:?}") };
        assert_eq!((modifier.leaf, modifier.subleaf, modifier.flags), (Hex(7), Hex(0), 1));
        assert_eq!(modifier.modifiers[0].bitmap.apply(0b1101), 0b1010);
        assert_eq!(config.msr_modifiers[0].bitmap.apply(6), 7);
        assert_eq!(config.kvm_capabilities[1], Capability { number: 172, needed: false });
        let again = serde_json::to_string(&config).unwrap();
        assert!(again.contains(r#""0bxxxxxxxxxxxxxxxxxxxxxxxxxxxxx010""#), "{again}");
        assert_eq!(serde_json::from_str::<CpuConfig>(&again).unwrap(), config);
    }

    #[test]
    fn a_baseline_is_shown_as_it_is_written() {
        for baseline in CpuBaseline::ALL {
            assert_eq!(serde_json::to_value(baseline).unwrap(), baseline.to_string());
        }
        let unknown = serde_json::from_str::<CpuBaseline>(r#""T2""#).unwrap_err().to_string();
        assert!(unknown.contains("x86-64-v3"), "{unknown}");
    }

    #[test]
    fn what_is_no_template_is_named() {
        let error = |text: &str| serde_json::from_str::<CpuConfig>(text).unwrap_err().to_string();
        assert!(error(r#"{"reg_modifiers": []}"#).contains("reg_modifiers"));
        assert!(error(r#"{"msr_modifiers": [{"addr": "10", "bitmap": "0b1"}]}"#).contains("begins with 0x"));
        let long = "1".repeat(65);
        assert!(
            error(&format!(r#"{{"msr_modifiers": [{{"addr": "0x10", "bitmap": "{long}"}}]}}"#))
                .contains("more than 64")
        );
        assert!(error(r#"{"msr_modifiers": [{"addr": "0x10", "bitmap": "0b2"}]}"#).contains("'2'"));
        assert!(error(r#"{"kvm_capabilities": ["!x"]}"#).contains("!x"));
        let source = |text: &str| serde_json::from_str::<CpuConfigSource>(text);
        assert_eq!(source(r#""t.json""#).unwrap(), CpuConfigSource::Path("t.json".into()));
        assert!(source(r#"{"vcpu_features": []}"#).unwrap_err().to_string().contains("vcpu_features"));
    }
}
