// Search where the site is opened as a file: browsers start no worker from file://, so an iframe runs the worker's script.
// The same idea as the package iframe-worker (Martin Donath, MIT), which the theme would load from another host.
"use strict";
(() => {
  if (location.protocol !== "file:") return;

  // In the iframe: what a worker has, made of what a page has.
  const prelude = `
    postMessage = message => parent.postMessage(message, "*");
    importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(done => {
      const script = document.createElement("script");
      script.src = url;
      script.onload = done;
      document.body.appendChild(script);
    })), Promise.resolve());
  `;

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inside = this.frame.contentDocument;
      inside.open();
      inside.write(`<body><script>${prelude}</` + `script><script src="${url}"></` + `script></body>`);
      inside.close();
      this.ready = new Promise(done => { this.frame.contentWindow.onload = done; });
      this.heard = event => {
        if (event.source !== this.frame.contentWindow) return;
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        if (this.onmessage) this.onmessage(event);
      };
      addEventListener("message", this.heard);
    }

    postMessage(message) {
      this.ready.then(() => {
        const event = new MessageEvent("message", { data: structuredClone(message) });
        this.frame.contentWindow.dispatchEvent(event);
      });
    }

    terminate() {
      removeEventListener("message", this.heard);
      this.frame.remove();
    }
  };
})();
