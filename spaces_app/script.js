// Links that hold what is shown, files that leave no copy on the server, and maps that the arrow keys walk through.
window.lmdLink = (values) => {
  const url = new URL(location.href);
  for (const [key, value] of Object.entries(values)) {
    const text = String(value ?? "").trim();
    text === "" ? url.searchParams.delete(key) : url.searchParams.set(key, text);
  }
  history.replaceState(history.state, "", url);
  if (window.parent !== window) window.parent.postMessage({ queryString: url.search.slice(1) }, "https://huggingface.co");
};
// Gradio's sign-in leads back to the first value of the address alone; the others are kept here meanwhile.
const kept = sessionStorage.getItem("lmdKept");
if (kept) history.replaceState(history.state, "", location.pathname + kept);
sessionStorage.removeItem("lmdKept");
document.addEventListener("click", (event) => {
  if (event.target.closest("#login")) sessionStorage.setItem("lmdKept", location.search);
}, true);
// A page opens on its first tab before it goes to the one in its address: that is no choice of the visitor's.
window.lmdTab = (tab) => {
  if (window.lmdRestored) lmdLink({ tab });
  setTimeout(lmdReach, 300);
};
// What scrolls can be reached by keyboard.
window.lmdReach = () => document.querySelectorAll("#section table").forEach((table) => { table.tabIndex = 0; });
const lmdBlob = (parcel) =>
  new Blob([Uint8Array.from(atob(parcel.base64), (letter) => letter.charCodeAt(0))], { type: parcel.mime });
window.lmdSave = (parcel) => {
  if (!parcel) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(lmdBlob(parcel));
  link.download = parcel.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
};
window.lmdShow = (parcel) => {
  const place = document.querySelector("#whole .lmd-frame");
  if (!parcel || !place) return;
  const frame = document.createElement("iframe");
  frame.title = "The whole report";
  frame.sandbox = "allow-scripts allow-downloads";
  lmdBlob(parcel).text().then((text) => { frame.srcdoc = text; place.replaceChildren(frame); });
};
