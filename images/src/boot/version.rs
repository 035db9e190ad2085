//! Which of two kernel versions is newer.

use std::cmp::Ordering;

/// Compares piece by piece, runs of digits as numbers: `6.10` is newer than `6.9`.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        let (Some(x), Some(y)) = (a.first(), b.first()) else { return a.len().cmp(&b.len()) };
        if x.is_ascii_digit() && y.is_ascii_digit() {
            let (number_a, number_b) = (digits(&mut a), digits(&mut b));
            // Without leading zeros, the longer number is the larger one, however long they are.
            let order = number_a.len().cmp(&number_b.len()).then_with(|| number_a.cmp(number_b));
            if order.is_ne() {
                return order;
            }
        } else {
            if x != y {
                return x.cmp(y);
            }
            (a, b) = (&a[1..], &b[1..]);
        }
    }
}

/// Takes the number at the front, leading zeros dropped.
fn digits<'a>(bytes: &mut &'a [u8]) -> &'a [u8] {
    let len = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = bytes.split_at(len);
    *bytes = rest;
    &number[number.iter().take_while(|byte| **byte == b'0').count()..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_as_numbers() {
        for (older, newer) in [
            ("6.9", "6.10"),
            ("6.1.0-17-cloud-amd64", "6.1.0-18-cloud-amd64"),
            ("5.10.0", "6.1"),
            ("6.1", "6.1.1"),
            ("6.1.0-9", "6.1.0-10"),
            ("1", "99999999999999999999999999999"),
        ] {
            assert_eq!(compare(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(compare(newer, older), Ordering::Greater, "{newer} {older}");
        }
        assert_eq!(compare("6.01", "6.1"), Ordering::Equal);
    }
}
