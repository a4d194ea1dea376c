// SPDX-License-Identifier: Apache-2.0
//! A small language over CRI v1: what the kubelet does to pods, in few words.
//!
//! ```ignore
//! let pod = client.pod("web").handler("podhull").run().await?;
//! let main = pod.container("main").command(["sleep", "1000"]).start().await?;
//! assert_eq!(main.exec(["id", "-u"]).await?.text(), "0");
//! pod.remove().await?;
//! ```

mod container;
mod log;
mod pod;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ImageSpec, ImageStatusRequest, ListPodSandboxRequest, PodSandboxFilter, StatusRequest,
    UpdateContainerResourcesRequest, UpdateContainerResourcesResponse,
};
use tokio::net::UnixStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

pub use container::{Container, ContainerBuilder, Output};
pub use log::Log;
pub use pod::{Pod, PodBuilder};

/// The types of the interface itself.
pub use k8s_cri::v1 as api;

/// No call of the kubelet's takes longer; most take far less.
const CALL_WITHIN: Duration = Duration::from_secs(240);

/// Both services of one containerd. A clone is another handle to the same
/// connection, which is made again when containerd has restarted.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// A client that connects to `socket` at its first call.
    ///
    /// # Errors
    /// Never in practice: the endpoint is a constant.
    pub fn new(socket: &Path) -> Result<Self> {
        let socket = PathBuf::from(socket);
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://containerd")
            .timeout(CALL_WITHIN)
            .connect_with_connector_lazy(connector);
        Ok(Self { channel })
    }

    /// The generated client of the runtime service.
    #[must_use]
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// The generated client of the image service.
    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// The conditions that are not yet true; none means that pods can be run.
    ///
    /// # Errors
    /// If containerd does not answer.
    pub async fn not_ready(&self) -> Result<Vec<String>> {
        let mut request = Request::new(StatusRequest { verbose: false });
        request.set_timeout(Duration::from_secs(5));
        let response = self.runtime().status(request).await.context("Status")?;
        let conditions = response.into_inner().status.unwrap_or_default().conditions;
        Ok(conditions
            .into_iter()
            .filter(|condition| !condition.status)
            // A warning about old cgroups or configuration keys is no obstacle.
            .filter(|condition| matches!(&*condition.r#type, "RuntimeReady" | "NetworkReady"))
            .map(|condition| format!("{}: {}", condition.r#type, condition.message))
            .collect())
    }

    /// What containerd says of its CNI, in JSON.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn cni_status(&self) -> Result<String> {
        let request = StatusRequest { verbose: true };
        let response = self.runtime().status(request).await.context("Status")?;
        let mut info = response.into_inner().info;
        info.remove("cniconfig").context("no CNI in the status")
    }

    /// True if CRI knows the image.
    ///
    /// # Errors
    /// If containerd does not answer.
    pub async fn has_image(&self, name: &str) -> Result<bool> {
        let image = ImageSpec {
            image: name.into(),
            ..ImageSpec::default()
        };
        let request = ImageStatusRequest {
            image: Some(image),
            verbose: false,
        };
        let response = self
            .images()
            .image_status(request)
            .await
            .context("ImageStatus")?;
        Ok(response.into_inner().image.is_some())
    }

    /// UpdatePodSandboxResources, with nothing but the pod's id: newer than the types
    /// here, whose UpdateContainerResources has the same shape.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn update_pod(&self, id: &str) -> Result<(), Status> {
        let path =
            PathAndQuery::from_static("/runtime.v1.RuntimeService/UpdatePodSandboxResources");
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        let ready = grpc.ready().await;
        ready.map_err(|error| Status::unavailable(error.to_string()))?;
        let request = UpdateContainerResourcesRequest {
            container_id: id.into(),
            ..UpdateContainerResourcesRequest::default()
        };
        let codec: ProstCodec<_, UpdateContainerResourcesResponse> = ProstCodec::default();
        let answer = grpc.unary(Request::new(request), path, codec);
        answer.await.map(drop)
    }

    /// A pod to be.
    pub fn pod(&self, name: &str) -> PodBuilder {
        PodBuilder::new(self.clone(), name)
    }

    /// The ids of the pods that carry a label; all pods without one.
    ///
    /// # Errors
    /// If containerd does not answer.
    pub async fn pod_ids(&self, label: Option<(&str, &str)>) -> Result<Vec<String>> {
        let filter = PodSandboxFilter {
            label_selector: label
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
            ..PodSandboxFilter::default()
        };
        let request = ListPodSandboxRequest {
            filter: Some(filter),
        };
        let response = self
            .runtime()
            .list_pod_sandbox(request)
            .await
            .context("ListPodSandbox")?;
        Ok(response
            .into_inner()
            .items
            .into_iter()
            .map(|pod| pod.id)
            .collect())
    }
}

/// The reply behind an error, if containerd gave one.
#[must_use]
pub fn reply(error: &anyhow::Error) -> Option<&Status> {
    error.chain().find_map(|cause| cause.downcast_ref())
}
