// SPDX-License-Identifier: Apache-2.0
//! A shim's streams for the tests, with ttrpc's client in containerd's place, and
//! the other ends of the FIFOs in the sandbox's.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use podhull_types::{ContainerId, SandboxId};
use prost::Message as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use ttrpc::r#async::transport::Socket;
use ttrpc::r#async::{Client, ClientStream};
use ttrpc::proto::{GenMessage, MESSAGE_TYPE_DATA, MessageHeader};

use super::frames::{Data, StreamInit, WindowUpdate};
use super::*;
use crate::connections::route;

/// No step takes longer.
pub(super) const WITHIN: Duration = Duration::from_secs(20);
/// In this time, what must not happen would.
pub(super) const QUIET: Duration = Duration::from_millis(200);

pub(super) struct Bench {
    pub(super) folder: tempfile::TempDir,
    pub(super) run_dir: RunDir,
    pub(super) streams: Arc<Streams>,
    pub(super) process: ProcessRef,
}

pub(super) fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = RunDir::of(folder.path(), "k8s.io", &SandboxId::new("s1").unwrap());
    Bench {
        streams: Streams::new(&run_dir),
        process: ProcessRef::init(ContainerId::new("c1").unwrap()),
        folder,
        run_dir,
    }
}

/// What containerd has of one stream.
pub(super) struct Open {
    _client: Client,
    pub(super) stream: ClientStream<Any, Any>,
}

pub(super) fn any(type_url: &str, message: &impl prost::Message) -> Any {
    crate::wire::any(type_url, message.encode_to_vec())
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    Deadline::after(WITHIN).run(future).await.unwrap()
}

pub(super) async fn is_quiet(future: impl Future) -> bool {
    Deadline::after(QUIET).run(future).await.is_err()
}

impl Bench {
    pub(super) fn uri(&self, id: &str) -> String {
        let socket = self.run_dir.socket();
        format!("ttrpc+unix://{}?streaming_id={id}", socket.display())
    }

    /// All three streams of `c1`.
    pub(super) fn uris(&self) -> Uris {
        Uris {
            stdin: self.uri("c1-stdin"),
            stdout: self.uri("c1-stdout"),
            stderr: self.uri("c1-stderr"),
        }
    }

    pub(super) fn fifo(&self, id: &str) -> PathBuf {
        self.run_dir.streams().join(id)
    }

    pub(super) fn connection(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = Connection::new(theirs, TaskTracker::new().token());
        tokio::spawn(route(theirs, Arc::clone(&self.streams)));
        ours
    }

    pub(super) async fn request(&self, method: &str, id: &str) -> ttrpc::Result<Open> {
        let client = Client::new(Socket::new(self.connection()));
        let request = ttrpc::Request {
            service: frames::SERVICE.into(),
            method: method.into(),
            ..ttrpc::Request::default()
        };
        let mut stream = ClientStream::new(client.new_stream(request, true, true).await?);
        let init = StreamInit { id: id.into() };
        stream.send(&any(frames::INIT, &init)).await?;
        within(stream.recv()).await?;
        Ok(Open {
            _client: client,
            stream,
        })
    }

    pub(super) async fn open(&self, id: &str) -> Open {
        self.request(frames::METHOD, id).await.unwrap()
    }

    /// Makes the process, and gives its ends of stdin and stdout.
    pub(super) fn make(&self) -> (pipe::Receiver, pipe::Sender) {
        let claim = self.streams.claim(&self.process, self.uris(), false);
        let claim = claim.unwrap();
        let stdio = claim.stdio();
        let stdin = pipe::OpenOptions::new().open_receiver(stdio.stdin.unwrap());
        let stdout = pipe::OpenOptions::new()
            .read_write(true)
            .open_sender(stdio.stdout.unwrap());
        claim.start();
        (stdin.unwrap(), stdout.unwrap())
    }
}

impl Open {
    pub(super) async fn grant(&self, update: i32) {
        let message = any(frames::WINDOW_UPDATE, &WindowUpdate { update });
        self.stream.send(&message).await.unwrap();
    }

    pub(super) async fn write(&self, data: &[u8]) {
        let data = Data {
            data: data.to_vec().into(),
        };
        self.stream.send(&any(frames::DATA, &data)).await.unwrap();
    }

    /// The next of the output; `None` at its end.
    pub(super) async fn data(&mut self) -> Option<Vec<u8>> {
        match self.stream.recv().await {
            Ok(any) => {
                assert_eq!(any.type_url, frames::DATA);
                Some(Data::decode(&*any.value).unwrap().data.into())
            }
            Err(ttrpc::Error::Eof) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// That much of the output.
    pub(super) async fn read(&mut self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            let data = within(self.data()).await;
            all.extend(data.unwrap_or_else(|| panic!("ended after {}", all.len())));
        }
        assert_eq!(all.len(), count);
        all
    }

    /// By how much stdin may go on.
    pub(super) async fn window(&mut self) -> usize {
        let any = within(self.stream.recv()).await.unwrap();
        assert_eq!(any.type_url, frames::WINDOW_UPDATE);
        let update = WindowUpdate::decode(&*any.value).unwrap().update;
        usize::try_from(update).unwrap()
    }
}

pub(super) fn frame(mut header: MessageHeader, flags: u8, payload: &[u8]) -> Vec<u8> {
    header.length = u32::try_from(payload.len()).unwrap();
    header.set_flags(flags);
    [&*Vec::<u8>::from(header), payload].concat()
}

/// Opens a stream as Go's client does, which does not say that its request has
/// no first message, unlike ttrpc's for Rust.
pub(super) async fn open_as_go(bench: &Bench, id: &str) -> UnixStream {
    let mut connection = bench.connection();
    let request = ttrpc::Request {
        service: frames::SERVICE.into(),
        method: frames::METHOD.into(),
        ..ttrpc::Request::default()
    };
    let request = ttrpc::proto::Codec::encode(&request).unwrap();
    let init = any(frames::INIT, &StreamInit { id: id.into() });
    let init = ttrpc::proto::Codec::encode(&init).unwrap();
    let open = ttrpc::proto::FLAG_REMOTE_OPEN;
    let request = frame(MessageHeader::new_request(1, 0), open, &request);
    let init = frame(MessageHeader::new_data(1, 0), 0, &init);
    connection
        .write_all(&[request, init].concat())
        .await
        .unwrap();
    let answer = within(GenMessage::read_from(&mut connection))
        .await
        .unwrap();
    let header = answer.header;
    assert_eq!((header.type_, header.stream_id), (MESSAGE_TYPE_DATA, 1));
    connection
}
