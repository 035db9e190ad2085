//! What a path may lead to, in words, for the messages of those who wanted something else.

use std::fs::FileType;
use std::os::unix::fs::FileTypeExt;

/// What a file of this type is, with its article.
pub fn kind(file_type: FileType) -> &'static str {
    match file_type {
        it if it.is_file() => "a regular file",
        it if it.is_dir() => "a directory",
        it if it.is_symlink() => "a symbolic link",
        it if it.is_fifo() => "a FIFO",
        it if it.is_socket() => "a socket",
        it if it.is_char_device() => "a character device",
        it if it.is_block_device() => "a block device",
        _ => "of an unknown type",
    }
}
