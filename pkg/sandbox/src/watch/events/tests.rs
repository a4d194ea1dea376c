// SPDX-License-Identifier: Apache-2.0
//! An agent whose streams of events end, or leave something out.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use podhull_api::agent::agent_server::{Agent, AgentServer};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::super::start;
use super::*;
use crate::fixture::{self, Stop};
use crate::spec::Stdio;

/// Answers pings; each stream has the events of the next list and ends then.
#[derive(Debug)]
struct Scripted {
    streams: Mutex<VecDeque<Vec<agent::Event>>>,
    asked: Arc<Mutex<Vec<u64>>>,
}

macro_rules! unknown {
    ($($method:ident: $request:ident -> $response:ident),* $(,)?) => {
        $(
            fn $method<'s, 'a>(
                &'s self,
                _: Request<agent::$request>,
            ) -> Answer<'a, agent::$response>
            where
                's: 'a,
                Self: 'a,
            {
                Box::pin(async { Err(Status::unimplemented("not scripted")) })
            }
        )*
    };
}

type Answer<'a, T> =
    std::pin::Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send + 'a>>;

#[tonic::async_trait]
impl Agent for Scripted {
    type EventsStream = tokio_stream::Iter<std::vec::IntoIter<Result<agent::Event, Status>>>;

    async fn events(
        &self,
        request: Request<agent::EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let after = request.into_inner().after_sequence;
        self.asked.lock().unwrap().push(after);
        let next = self.streams.lock().unwrap().pop_front();
        let events: Vec<_> = next.unwrap_or_default().into_iter().map(Ok).collect();
        Ok(Response::new(tokio_stream::iter(events)))
    }

    async fn ping(
        &self,
        _: Request<agent::PingRequest>,
    ) -> Result<Response<agent::PingResponse>, Status> {
        Ok(Response::new(agent::PingResponse::default()))
    }

    unknown! {
        configure: ConfigureRequest -> ConfigureResponse,
        create_container: CreateContainerRequest -> CreateContainerResponse,
        create_exec: CreateExecRequest -> CreateExecResponse,
        start: StartRequest -> StartResponse,
        signal: SignalRequest -> SignalResponse,
        resize: ResizeRequest -> ResizeResponse,
        delete: DeleteRequest -> DeleteResponse,
        pids: PidsRequest -> PidsResponse,
        pause: PauseRequest -> PauseResponse,
        resume: ResumeRequest -> ResumeResponse,
        update: UpdateRequest -> UpdateResponse,
        stats: StatsRequest -> StatsResponse,
        shutdown: ShutdownRequest -> ShutdownResponse,
    }
}

fn exit(sequence: u64, container: &str) -> agent::Event {
    agent::Event {
        sequence,
        kind: Some(event::Kind::Exited(agent::ProcessExited {
            container_id: container.into(),
            exit: Some(agent::Exit {
                code: 3,
                ..agent::Exit::default()
            }),
            ..agent::ProcessExited::default()
        })),
    }
}

/// What the waiter of `c1` got with these streams, and after which events the
/// streams were asked for.
async fn with(streams: &[&[agent::Event]]) -> (u8, Option<String>, Vec<u64>) {
    let folder = tempfile::tempdir().unwrap();
    let ended = CancellationToken::new();
    ended.cancel();
    let (sandbox, guest) = fixture::sandbox(folder.path(), Stop::Waits(ended)).await;
    let asked = Arc::default();
    let agent = Scripted {
        streams: Mutex::new(streams.iter().map(|events| events.to_vec()).collect()),
        asked: Arc::clone(&asked),
    };
    let served = tokio::spawn(serve(agent, guest));
    let id = ProcessRef::init(ContainerId::new("c1").unwrap());
    let process = sandbox.enter(&id, 7, Stdio::default(), false).unwrap();
    process.started(|_| {});
    start(&sandbox).await;
    let exit = process.wait().await;
    let death = sandbox.death.get().cloned();
    // It does not answer to a shutdown.
    assert!(!sandbox.stop(fixture::soon()).await.is_clean() || death.is_some());
    served.abort();
    let asked = asked.lock().unwrap().clone();
    (exit.code, death, asked)
}

async fn serve(agent: Scripted, stream: UnixStream) {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::UnixStream::from_std(stream).unwrap();
    let once = tokio_stream::iter([Ok::<_, std::io::Error>(stream)]);
    tonic::transport::Server::builder()
        .add_service(AgentServer::new(agent))
        .serve_with_incoming(once)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_stream_that_ends_is_followed_by_another() {
    let (code, death, asked) = with(&[&[exit(1, "c0")], &[], &[exit(2, "c1")]]).await;
    assert_eq!((code, death), (3, None));
    assert_eq!(asked[..3], [0, 1, 1]);
}

#[tokio::test]
async fn an_event_that_was_left_out_is_asked_for_again() {
    let (code, death, asked) = with(&[
        &[exit(1, "c0"), exit(3, "c2")],
        &[exit(2, "c1"), exit(3, "c2")],
    ])
    .await;
    assert_eq!((code, death), (3, None));
    assert_eq!(asked[..2], [0, 1]);
}

/// Nobody waits for good for what an agent does not tell.
#[tokio::test]
async fn an_agent_that_tells_nothing_is_given_up() {
    let (code, death, asked) = with(&[]).await;
    assert_eq!(code, ExitStatus::vm_gone().code);
    assert!(death.unwrap().contains("the stream ended"));
    assert_eq!(asked, [0, 0, 0]);
}

#[tokio::test]
async fn an_end_that_a_guest_tells_over_and_over_is_work_once() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _guest) = fixture::sandbox(folder.path(), Stop::Panics).await;
    let id = ProcessRef::init(ContainerId::new("c1").unwrap());
    let process = sandbox.enter(&id, 7, Stdio::default(), false).unwrap();
    process.started(|_| {});
    for sequence in 1..=10_000 {
        handle(&sandbox, exit(sequence, "c1").kind.unwrap());
    }
    assert_eq!(sandbox.tasks.len(), 1);
    assert_eq!(process.wait().await.code, 3);
}
