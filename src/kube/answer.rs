//! The body of an answer of the API server, event by event or piece by piece.
//!
//! Takes the body, gives bytes that are whole: the lines of JSON, or the messages of protobuf, each after its length. Must
//! never give a part of an event for the whole.

use std::io;
use std::pin::Pin;

use futures::TryStreamExt;
use futures::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use http_body_util::BodyExt;
use kube::client::Body;

use super::wire::Encoding;

/// The longest event or page, in bytes: etcd holds objects of at most 1.5 MiB by default, and a page of 500 of those is the
/// worst that can come.
const MAX_BYTES: u64 = 1 << 30;

/// A body that is being read.
pub(super) struct Answer {
    /// How it is written.
    pub(super) encoding: Encoding,
    reader: Pin<Box<dyn AsyncBufRead + Send>>,
}

impl Answer {
    pub(super) fn new(encoding: Encoding, body: Body) -> Self {
        let stream = body.into_data_stream().map_err(io::Error::other);
        Self {
            encoding,
            reader: Box::pin(stream.into_async_read()),
        }
    }

    /// Reads the next event of a watch, in place of what the buffer holds; false: there is none, the answer has ended.
    ///
    /// # Errors
    /// When the connection breaks, also within an event.
    pub(super) async fn event(&mut self, buffer: &mut Vec<u8>) -> io::Result<bool> {
        buffer.clear();
        match self.encoding {
            Encoding::Json => {
                let mut line = (&mut self.reader).take(MAX_BYTES);
                line.read_until(b'\n', buffer).await?;
                if !buffer.is_empty() && !buffer.ends_with(b"\n") {
                    return Err(cut_short());
                }
                Ok(!buffer.is_empty())
            }
            Encoding::Protobuf => {
                if self.reader.fill_buf().await?.is_empty() {
                    return Ok(false);
                }
                let mut length = [0; 4];
                self.reader.read_exact(&mut length).await?;
                let length = u64::from(u32::from_be_bytes(length));
                // As it comes: a length that is wrong must not make us take memory.
                let mut message = (&mut self.reader).take(length.min(MAX_BYTES));
                if message.read_to_end(buffer).await? as u64 != length {
                    return Err(cut_short());
                }
                Ok(true)
            }
        }
    }

    /// Adds what has come next to the buffer; false: the answer has ended.
    ///
    /// # Errors
    /// When the connection breaks, or there is more than any answer has.
    pub(super) async fn piece(&mut self, buffer: &mut Vec<u8>) -> io::Result<bool> {
        let piece = self.reader.fill_buf().await?;
        let read = piece.len();
        if buffer.len() as u64 + read as u64 > MAX_BYTES {
            return Err(io::Error::other("the answer does not end"));
        }
        buffer.extend_from_slice(piece);
        self.reader.consume_unpin(read);
        Ok(read > 0)
    }
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it broke within an event")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of an answer that comes in pieces of so many bytes, and how it ends.
    async fn read(
        encoding: Encoding,
        bytes: &[u8],
        piece: usize,
    ) -> (Vec<Vec<u8>>, Option<String>) {
        let pieces = bytes.chunks(piece).map(|p| Ok::<_, io::Error>(p.to_vec()));
        let stream = futures::stream::iter(pieces.collect::<Vec<_>>());
        let mut answer = Answer {
            encoding,
            reader: Box::pin(stream.into_async_read()),
        };
        let (mut events, mut buffer) = (Vec::new(), b"what was before".to_vec());
        loop {
            match answer.event(&mut buffer).await {
                Ok(true) => events.push(buffer.clone()),
                Ok(false) => return (events, None),
                Err(error) => return (events, Some(error.to_string())),
            }
        }
    }

    fn framed(messages: &[&[u8]]) -> Vec<u8> {
        let frame = |message: &&[u8]| {
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            [&length, *message].concat()
        };
        messages.iter().flat_map(frame).collect()
    }

    #[tokio::test]
    async fn events_are_whole_however_they_come() {
        let lines = b"{\"a\":1}\n{}\n";
        let messages: [&[u8]; 4] = [b"\n\0k8s\n", b"x", b"", &[7; 300]];
        let frames = framed(&messages);
        for piece in [1, 2, 3, 5, 1000] {
            let (events, end) = read(Encoding::Json, lines, piece).await;
            assert_eq!(events, [b"{\"a\":1}\n".to_vec(), b"{}\n".to_vec()]);
            assert_eq!(end, None);
            let (events, end) = read(Encoding::Protobuf, &frames, piece).await;
            assert_eq!(events, messages);
            assert_eq!(end, None);
        }
    }

    #[tokio::test]
    async fn an_event_that_is_cut_short_is_none() {
        let (events, end) = read(Encoding::Json, b"{}\n{\"a\"", 3).await;
        assert_eq!((events.len(), end.is_some()), (1, true));
        let frames = framed(&[b"one", b"two"]);
        for cut in 8..frames.len() {
            let (events, end) = read(Encoding::Protobuf, &frames[..cut], 4).await;
            assert_eq!(events, [b"one"], "{cut}");
            assert!(end.is_some(), "{cut}");
        }
        // A length that no API server sends takes no memory.
        let (events, end) = read(Encoding::Protobuf, &[0xff, 0xff, 0xff, 0xff, 1, 2], 3).await;
        assert_eq!(events, [b""; 0]);
        assert!(end.is_some_and(|end| end.contains("within an event")));
    }
}
