//! A table that is accepted is written back as the same bytes, and its frames lie one behind the other.
#![no_main]

use bedplate_images::pack::Table;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(table) = Table::parse_alone(bytes) {
        let head = table.encode();
        assert!(bytes.starts_with(&head));
        let end = table.entries().iter().fold(head.len() as u64, |at, entry| {
            assert_eq!(entry.offset, at);
            at + u64::from(entry.len)
        });
        assert_eq!(end, table.len());
    }
});
