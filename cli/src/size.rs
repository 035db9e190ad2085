//! Sizes as people write them.

/// Text that is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// Not a number with a unit.
    #[error("{0:?} is not a size: write a number of MiB, or a number with M or G, such as 512M or 2G")]
    Malformed(String),
    /// No machine has that.
    #[error("{0:?} is more than any machine has")]
    TooLarge(String),
}

/// Reads `512`, `512M`, `512MiB`, `2G`, `2GiB`, `1T` as a number of MiB. A bare number counts MiB.
///
/// # Errors
/// See [`ParseSizeError`].
pub fn parse_mib(text: &str) -> Result<u64, ParseSizeError> {
    let malformed = || ParseSizeError::Malformed(text.chars().take(40).collect());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1 << 10,
        "t" | "tb" | "tib" => 1 << 20,
        _ => return Err(malformed()),
    };
    if number.is_empty() {
        return Err(malformed());
    }
    let too_large = || ParseSizeError::TooLarge(text.chars().take(40).collect());
    let mib = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(too_large)?;
    // 2^52 MiB do not fit 64 bits of bytes with room to spare.
    if mib > 1 << 40 { Err(too_large()) } else { Ok(mib) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, mib) in [("512", 512), ("512M", 512), ("2g", 2048), ("1GiB", 1024), ("1 T", 1 << 20), ("0", 0)] {
            assert_eq!(parse_mib(text), Ok(mib), "{text}");
        }
        for bad in ["", "M", "-1", "1.5G", "12K", "1GG"] {
            assert!(matches!(parse_mib(bad), Err(ParseSizeError::Malformed(_))), "{bad}");
        }
        for huge in ["99999999999999999999", "18446744073709551615G", "9999999999T"] {
            assert!(matches!(parse_mib(huge), Err(ParseSizeError::TooLarge(_))), "{huge}");
        }
    }
}
